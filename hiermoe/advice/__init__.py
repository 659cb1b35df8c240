"""`hiermoe advise`: would it help another model on another cluster?

``inputs`` makes a case of what the user gives, ``assessment`` computes its numbers, ``recommendation`` turns them into
one of four answers by named thresholds, ``sensitivity`` asks what would change the answer, ``page`` writes it all down.
"""
