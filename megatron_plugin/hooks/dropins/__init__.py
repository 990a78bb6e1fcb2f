"""Our losses inside other people's training frameworks, a function or two for each.  README.md has a page per framework: the signature that was
read and where, the lines a user writes, whose normalisation holds, and what of it was run."""
