"""What others take: challenges' files, folders of texts, a container for Grand-Challenge."""
