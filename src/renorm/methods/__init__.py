"""Ways to adapt without labels, one per file; `renorm.methods.base.catalogue()` finds them."""
