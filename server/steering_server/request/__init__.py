"""What a request asks of steering, in every form it may ask in, and what it is told of it."""
