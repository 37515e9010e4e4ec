"""Arrays to pictures: (H, W, 3) in 8 bits. Knows numpy and Pillow, and neither torch nor what is done with them."""
