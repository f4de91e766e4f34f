"""What styles do to each other, and what a switch saves: figures for the Interference tab and the header."""
