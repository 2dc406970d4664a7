#!/bin/sh
# A program that knows nothing of training: asks for a sum, writes the answer into a file, and tries again if it was none.
# Called as: agent.sh QUESTION
question=$1
for attempt in 1 2 3; do
    printf '{"model": "policy", "max_tokens": 16, "messages": [{"role": "user", "content": "%s"}]}' "$question" |
        curl --silent --show-error --fail --data-binary @- -H "Content-Type: application/json" \
            -H "Authorization: Bearer $OPENAI_API_KEY" "$OPENAI_BASE_URL/chat/completions" > reply.json || exit 2
    if grep --quiet '"content": *"[^"]*[0-9]' reply.json; then
        sed 's/.*"content": *"\([^"]*\)".*/\1/' reply.json > answer.txt
        exit 0
    fi
    question="$1 Answer with a number."
done
: > answer.txt
