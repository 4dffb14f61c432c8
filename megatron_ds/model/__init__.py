"""The dense decoder: layers, attention and its masks, initialisation, and what it all costs."""
