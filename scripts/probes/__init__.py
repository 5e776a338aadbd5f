"""What can be measured of a trained run: scripts.evaluate asks for it."""
