# Who may touch what, by Kubernetes service account: no Google service account, no key.
#
#            state                          exchange                 models   Pub/Sub
# gateway    read, create, delete           read, create, delete     read     pull
# train-step read, create, delete           outputs below jobs/      read
# sample     read; write jobs/, working/    outputs below jobs/      read
# reward     jobs/ and working/ only, and   outputs below jobs/
#            the key that opens functions

locals {
  pool = "principal://iam.googleapis.com/projects/${var.project_number}/locations/global/workloadIdentityPools/${var.project}.svc.id.goog/subject/ns/${var.namespace}/sa"

  gateway    = "${local.pool}/gateway"
  train_step = "${local.pool}/train-step"
  sample     = "${local.pool}/sample"

  # reward has no way to the metadata server; it shows its own token to this pool instead (knative/components/gke).
  reward = "principal://iam.googleapis.com/${google_iam_workload_identity_pool.reward.name}/subject/system:serviceaccount:${var.namespace}:reward"

  job_records = join(" || ", [for prefix in ["jobs/", "working/"] :
    "resource.name.startsWith('projects/_/buckets/${var.state_bucket}/objects/${prefix}')"
  ])
  outputs = "resource.name.startsWith('projects/_/buckets/${var.exchange_bucket}/objects/jobs/')"
}

resource "google_iam_workload_identity_pool" "reward" {
  project                   = var.project
  workload_identity_pool_id = "${var.name}-reward"
  display_name              = "${var.name} reward"
}

resource "google_iam_workload_identity_pool_provider" "cluster" {
  project                            = var.project
  workload_identity_pool_id          = google_iam_workload_identity_pool.reward.workload_identity_pool_id
  workload_identity_pool_provider_id = "cluster"
  attribute_condition                = "assertion.sub == 'system:serviceaccount:${var.namespace}:reward'"

  attribute_mapping = {
    "google.subject" = "assertion.sub"
  }

  oidc {
    issuer_uri        = var.issuer
    allowed_audiences = ["knapper-reward"]
  }
}

# Listing cannot be limited to a prefix, and objectViewer would also read: so a role that lists and no more.
resource "google_project_iam_custom_role" "list" {
  project     = var.project
  role_id     = replace("${var.name}_list", "-", "_")
  title       = "${var.name}: list objects"
  permissions = ["storage.objects.list"]
}

resource "google_storage_bucket_iam_member" "state" {
  for_each = {
    gateway    = { member = local.gateway, role = "roles/storage.objectUser" }
    train_step = { member = local.train_step, role = "roles/storage.objectUser" }
    sample     = { member = local.sample, role = "roles/storage.objectViewer" }
    reward     = { member = local.reward, role = google_project_iam_custom_role.list.id }
  }

  bucket = var.state_bucket
  role   = each.value.role
  member = each.value.member
}

resource "google_storage_bucket_iam_member" "job_records" {
  for_each = { sample = local.sample, reward = local.reward }

  bucket = var.state_bucket
  role   = "roles/storage.objectUser"
  member = each.value

  condition {
    title      = "records of jobs"
    expression = local.job_records
  }
}

# By it reward knows who calls; the others read it with the rest.
resource "google_storage_bucket_iam_member" "function_key" {
  bucket = var.state_bucket
  role   = "roles/storage.objectViewer"
  member = local.reward

  condition {
    title      = "key of the functions"
    expression = "resource.name == 'projects/_/buckets/${var.state_bucket}/objects/secrets/functions'"
  }
}

resource "google_storage_bucket_iam_member" "exchange" {
  bucket = var.exchange_bucket
  role   = "roles/storage.objectUser"
  member = local.gateway
}

resource "google_storage_bucket_iam_member" "outputs" {
  for_each = { train_step = local.train_step, sample = local.sample, reward = local.reward }

  bucket = var.exchange_bucket
  role   = "roles/storage.objectUser"
  member = each.value

  condition {
    title      = "outputs of jobs"
    expression = local.outputs
  }
}

resource "google_storage_bucket_iam_member" "models" {
  for_each = { gateway = local.gateway, train_step = local.train_step, sample = local.sample }

  bucket = var.models_bucket
  role   = "roles/storage.objectViewer"
  member = each.value
}

resource "google_pubsub_subscription_iam_member" "gateway" {
  project      = var.project
  subscription = var.subscription
  role         = "roles/pubsub.subscriber"
  member       = local.gateway
}
