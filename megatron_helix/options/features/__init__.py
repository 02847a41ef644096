"""One table of every flag of Megatron's, and what it is beside helix.

A flag of the parser, or a field of the config classes that no flag sets, stands in exactly one
row: it works (:mod:`.works`), is refused (:mod:`.refused`) or cannot interact (:mod:`.apart`). A
test reads the parser and the config classes and fails for a name without a row.
"""
