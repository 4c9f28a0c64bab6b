"""What makes the two programs practical. No method needs it to be understood."""
