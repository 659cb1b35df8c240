"""What tokens want: recorded traces and synthetic routing, one step at a time."""
