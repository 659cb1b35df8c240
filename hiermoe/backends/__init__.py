"""Where a run happens."""
