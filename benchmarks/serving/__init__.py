"""What `serving_load` compares `shira serve` with, and the clients that ask all of them."""
