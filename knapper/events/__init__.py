"""CloudEvents: how they read, the Broker they are posted to, and a bucket's notifications."""
