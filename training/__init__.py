"""Train an autoencoder: `training.train(config)`."""
