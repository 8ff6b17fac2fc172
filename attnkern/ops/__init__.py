"""One folder an operator; see ``squeeze_excite`` for the shape of one."""
