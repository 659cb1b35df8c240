"""What breaks, and how it ends: one line that says what is wrong, nothing left over, nothing believed."""
