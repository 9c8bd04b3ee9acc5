"""Whether an image can run the jobs: imports them, and lists the devices that JAX finds. Fails with what is missing."""

import apache_beam
import jax

import pipelines.generate_images
import sdjax

print(f"sdjax {sdjax.__version__}, jax {jax.__version__}, apache-beam {apache_beam.__version__}")
print(f"{pipelines.generate_images.__name__} on {', '.join(map(str, jax.devices()))}")
