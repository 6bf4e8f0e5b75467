"""`push`: which files go to the Hugging Face Hub, with which card, and how."""
