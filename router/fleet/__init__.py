"""Models, pools, dead letters and the Manager's API as the Router serves them."""
