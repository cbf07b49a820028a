"""The modules, and the patch by which a program uses this package wherever it calls torch's loss."""
