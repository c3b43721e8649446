"""A service in front of trained models: OpenAI's HTTP API over Ray Serve.

In: the models of runs, exports or hub ids, and requests over HTTP. Out: answers and embeddings. An Engine (engine.py)
decodes many requests together: they join and leave its batch between two tokens.
"""
