"""What makes the programs practical. No method needs it to be understood."""
