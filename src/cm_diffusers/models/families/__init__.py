"""One file per architecture of a teacher's network: how it is called, taught text and latents, and adapted."""
