"""Secure aggregation: the server gets the sum of the clients' vectors, and no single one.

Pure parts, without torch and without messages' transport. `ring` has fixed-point numbers, `shamir`
and `keys` the cryptography, `masks` the masks, `graph` who shares masks with whom, `blocks` the
order of an adapter's values; `client` and `server` are the two sides of the protocol, `messages`
what they send. The protocol is that of Bonawitz et al. 2017 (CCS, doi 10.1145/3133956.3133982) with
the sparse graph of Bell et al. 2020 (CCS, doi 10.1145/3372297.3417885).
"""
