"""Real sites: the two Flower apps, a site's settings, and the trainer that stays warm there."""
