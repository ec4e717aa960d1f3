# 30-functions: the overlay, with this project's names in it, applied; and the way in from outside.

terraform {
  required_version = ">= 1.8"

  backend "gcs" {} # terraform init -backend-config=bucket=... -backend-config=prefix=30-functions

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 7.22, < 9"
    }
    helm = {
      source  = "hashicorp/helm"
      version = "~> 3.0"
    }
    local = {
      source  = "hashicorp/local"
      version = "~> 2.5"
    }
  }
}

provider "google" {
  project = var.platform.project
  region  = var.platform.region
}

data "google_client_config" "this" {}

data "google_container_cluster" "this" {
  project  = var.platform.project
  name     = var.platform.name
  location = var.platform.location
}

provider "helm" {
  kubernetes = {
    host  = "https://${data.google_container_cluster.this.control_plane_endpoints_config[0].dns_endpoint_config[0].endpoint}"
    token = data.google_client_config.this.access_token
  }
}

locals {
  targets  = ["gateway", "train-step", "sample", "sample-vllm", "reward"]
  manifest = "${path.module}/../../../knative"

  settings = merge({
    KNAPPER_STORE        = "gs://${var.platform.state_bucket}"
    KNAPPER_EXCHANGE     = "gs://${var.platform.exchange_bucket}"
    KNAPPER_SUBSCRIPTION = var.platform.subscription
  }, var.settings)

  credentials = jsonencode({
    universe_domain    = "googleapis.com"
    type               = "external_account"
    audience           = var.platform.reward_audience
    subject_token_type = "urn:ietf:params:oauth:token-type:jwt"
    token_url          = "https://sts.googleapis.com/v1/token"
    credential_source  = { file = "/var/run/google/token", format = { type = "text" } }
  })

  kustomization = {
    apiVersion       = "kustomize.config.k8s.io/v1beta1"
    kind             = "Kustomization"
    resources        = ["../../../../../knative/overlays/${var.overlay}"]
    generatorOptions = { disableNameSuffixHash = true }
    configMapGenerator = [
      {
        name     = "knapper", namespace = "knapper", behavior = "merge",
        literals = [for name, value in local.settings : "${name}=${value}"]
      },
      {
        name     = "reward-credentials", namespace = "knapper", behavior = "merge",
        literals = ["credentials.json=${local.credentials}"]
      },
    ]
    patches = [
      {
        target = { group = "serving.knative.dev", version = "v1", kind = "Service", name = "gateway|train-step|sample" }
        patch = yamlencode([{
          op    = "replace"
          path  = "/spec/template/spec/volumes/0/csi/volumeAttributes/bucketName"
          value = var.platform.models_bucket
        }])
      },
      {
        # Pods read the settings when they start: other settings are another revision.
        target = { group = "serving.knative.dev", version = "v1", kind = "Service" }
        patch = yamlencode([{
          op    = "add"
          path  = "/spec/template/metadata/annotations/knapper.dev~1settings"
          value = sha256(jsonencode([local.settings, local.credentials]))
        }])
      },
    ]
    images = [for target in local.targets : merge(
      { name = "REGION-docker.pkg.dev/PROJECT_ID/knapper/${target}", newName = "${var.registry}/${target}" },
      contains(keys(var.digests), target) ? { digest = var.digests[target] } : { newTag = var.release },
    )]
  }

  rendered = "${path.module}/.rendered/${var.platform.name}"
  sources = join(",", [for name in sort(fileset(local.manifest, "{base,components,overlays}/**")) :
    filesha256("${local.manifest}/${name}")
  ])
  context = "gcloud container clusters get-credentials ${var.platform.name} --location ${var.platform.location} --project ${var.platform.project} --dns-endpoint"
  exposed = var.hostname == "" ? 0 : 1
}

# Checked at every apply, before anything is made.
resource "terraform_data" "tools" {
  triggers_replace = timestamp()

  provisioner "local-exec" {
    command = "${abspath(path.module)}/../../tools.sh gcloud kubectl gke-gcloud-auth-plugin"
  }
}

resource "local_file" "kustomization" {
  filename = "${local.rendered}/kustomization.yaml"
  content  = yamlencode(local.kustomization)

  depends_on = [terraform_data.tools]
}

# What `terraform destroy` runs, and an update does not: Knative's objects go while Knative is there to finalize them, or the
# namespace would hang for ever.
resource "terraform_data" "removal" {
  input = { context = local.context, kubeconfig = "${abspath(local.rendered)}/kubeconfig" }

  provisioner "local-exec" {
    when = destroy
    command = join(" && ", [
      self.output.context,
      "kubectl delete services.serving.knative.dev,triggers.eventing.knative.dev,pingsources.sources.knative.dev --all -n knapper --timeout=10m",
      "kubectl delete brokers.eventing.knative.dev --all -n knapper --timeout=10m",
      "kubectl delete namespace knapper --ignore-not-found --timeout=10m",
    ])

    environment = {
      KUBECONFIG = self.output.kubeconfig
    }
  }

  depends_on = [terraform_data.tools]
}

# kubectl, as `knapper deploy` does it: server-side, so that fields which others own (models that `knapper deploy add` put
# into knapper-models) stay theirs.
resource "terraform_data" "overlay" {
  triggers_replace = sha256("${local_file.kustomization.content}${local.sources}")

  provisioner "local-exec" {
    command = "${local.context} && kubectl apply --server-side --field-manager knapper-terraform -k ${local.rendered}"

    environment = {
      KUBECONFIG = abspath("${local.rendered}/kubeconfig")
    }
  }

  depends_on = [terraform_data.removal]
}

# ---- The way in: a certificate, a load balancer, and the paths that clients use. The gateway's /events is for the cluster alone. ----

resource "google_certificate_manager_dns_authorization" "this" {
  count = local.exposed

  project = var.platform.project
  name    = var.platform.name
  domain  = var.hostname
}

resource "google_certificate_manager_certificate" "this" {
  count = local.exposed

  project = var.platform.project
  name    = var.platform.name

  managed {
    domains            = [var.hostname]
    dns_authorizations = [google_certificate_manager_dns_authorization.this[0].id]
  }
}

resource "google_certificate_manager_certificate_map" "this" {
  count = local.exposed

  project = var.platform.project
  name    = var.platform.name
}

resource "google_certificate_manager_certificate_map_entry" "this" {
  count = local.exposed

  project      = var.platform.project
  name         = var.platform.name
  map          = google_certificate_manager_certificate_map.this[0].name
  certificates = [google_certificate_manager_certificate.this[0].id]
  hostname     = var.hostname
}

resource "google_compute_global_address" "this" {
  count = local.exposed

  project = var.platform.project
  name    = var.platform.name
}

module "exposure" {
  source = "../../modules/objects"
  count  = local.exposed

  name      = "knapper-exposure"
  namespace = "knapper"
  objects = [for document in split("\n---\n", templatefile("${path.module}/exposure.yaml", {
    hostname = var.hostname
    address  = google_compute_global_address.this[0].name
    certmap  = google_certificate_manager_certificate_map.this[0].name
  })) : yamldecode(document)]

  depends_on = [terraform_data.overlay]
}

resource "google_dns_record_set" "gateway" {
  count = var.dns_zone == "" ? 0 : local.exposed

  project      = var.platform.project
  managed_zone = var.dns_zone
  name         = "${var.hostname}."
  type         = "A"
  ttl          = 300
  rrdatas      = [google_compute_global_address.this[0].address]
}

resource "google_dns_record_set" "certificate" {
  count = var.dns_zone == "" ? 0 : local.exposed

  project      = var.platform.project
  managed_zone = var.dns_zone
  name         = google_certificate_manager_dns_authorization.this[0].dns_resource_record[0].name
  type         = google_certificate_manager_dns_authorization.this[0].dns_resource_record[0].type
  ttl          = 300
  rrdatas      = [google_certificate_manager_dns_authorization.this[0].dns_resource_record[0].data]
}
