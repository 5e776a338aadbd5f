"""Constants that data and network share; importing them needs no torch."""

IGNORED = -100  # the target that cross-entropy ignores
