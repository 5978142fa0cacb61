"""`python -m cpr.vmm inspect`: what a CprState or a migration stream says, and what is wrong in it."""
