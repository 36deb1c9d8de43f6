"""``python -P -m fanfold.backends.workers.launched WORK SILENCE_S``: one worker."""

from .worker import main

if __name__ == "__main__":
    main()
