"""What a number is: the schema of records, run ids, provenance, and the results store."""
