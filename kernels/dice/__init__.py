"""Softmax, Dice, cross-entropy and the confusion matrix, each in one read of logits and labels."""
