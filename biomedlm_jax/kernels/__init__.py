"""Flash attention in Pallas: one `custom_vjp` over a kernel for each compiler, and the reference beside them."""
