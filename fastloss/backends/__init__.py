"""Who computes: the contract of both backends, the choice between them, and the eager one."""
