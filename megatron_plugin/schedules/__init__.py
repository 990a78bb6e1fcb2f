"""Numbers that change with the step: pure functions of it."""
