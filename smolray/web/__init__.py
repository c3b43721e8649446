"""The pages of `smolray web`: runs as they train, compared, and started, in a browser.

In: a storage folder of runs, and keys. Out: an ASGI app. It reads run folders as `smolray status` does, and acts only
as the commands do: a request to stop is a file in the run's folder, everything else is a command in a process of its
own.
"""
