#!/bin/sh
# Ends with 1 and says which of the programs named are not there, before Terraform makes anything that needs them.
missing=""
for tool in "$@"; do
  command -v "$tool" > /dev/null || missing="$missing $tool"
done
[ -z "$missing" ] && exit 0
echo "not on PATH:$missing. kubectl and gke-gcloud-auth-plugin come by: gcloud components install kubectl gke-gcloud-auth-plugin;" \
  "gcloud itself: https://cloud.google.com/sdk/docs/install" >&2
exit 1
