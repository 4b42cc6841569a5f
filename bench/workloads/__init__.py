"""What is measured: operators, networks and losses, and the variants of each that compete."""
