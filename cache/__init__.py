"""What is kept: identities, errors, eviction policies and the residency state machine.

Only the standard library and NumPy: nothing here knows a device, a tensor or a clock.
"""
