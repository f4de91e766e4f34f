"""Settings of a picture as frozen data, checked; strengths and series of them."""
