"""An HTTP server for one model, with the routes and the JSON of OpenAI's API."""
