"""The verb `inspect`: shows CPR states and migration streams, and what is wrong in them."""
