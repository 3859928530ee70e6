"""What the drop-ins stand on together."""
