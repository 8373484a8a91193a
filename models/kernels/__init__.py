"""Products of sorted rows and attention by kernels of each platform, behind one door."""
