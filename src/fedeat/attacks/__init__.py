"""Attacks on a federation and on its model.

byzantine   malicious clients that act alone: sign flip, noise, NaN, scaled updates
collusion   malicious clients that see the round's honest updates: IPM, ALIE, mimic, min-max, adaptive
poisoning   training data with wrong answers, or with a backdoor in it
backdoor    a trigger phrase that calls for a chosen answer, and texts that carry it
embedding   white box: perturbed embeddings along a grid of radii
text        black box: typing errors, substituted words, distracting clauses; `neighbours` finds the substitutes
adaptive_text  substitution that asks the model and adapts to it
refusal     how well harmful requests are refused under attack
pairs       attacked texts as original/modified pairs that an evaluation reads
"""
