"""Evidence of what runs at the other end: verifiers for each kind, and the policy that judges what they find.

Verifiers are pure: evidence, collateral, policy and time go in, a typed verdict comes out. There is no clock,
no network, no warning and no half verdict: what does not hold raises `AttestationError`, which names the
step, what was expected and what was got. Only `collateral` reads files, and only its `refresh` asks a server.
"""
