"""Numbers that several rooms must agree on."""

IGNORED = -100  # the target that cross-entropy leaves out, as torch has it
