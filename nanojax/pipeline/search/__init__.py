"""Which pipeline is best?  The paper's auto-search: structure and order first, then resource shares."""
