# 20-knative: the operator by its chart, and what it is to install, from knative/cluster/operator.

terraform {
  required_version = ">= 1.8"

  backend "gcs" {} # terraform init -backend-config=bucket=... -backend-config=prefix=20-knative

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 7.22, < 9"
    }
    helm = {
      source  = "hashicorp/helm"
      version = "~> 3.0"
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
  documents = flatten([for name in ["serving.yaml", "eventing.yaml"] :
    split("\n---\n", file("${path.module}/../../../knative/cluster/operator/${name}"))
  ])
  objects = [for document in local.documents : yamldecode(document)]

  # On Google Cloud a load balancer stands before Kourier (30-functions): Kourier itself is not reached from outside.
  kourier = { ingress = { kourier = { enabled = true, "service-type" = "ClusterIP" } } }

  # To YAML and back: the two sides of a conditional must be of one type.
  installed = [for object in local.objects : yamldecode(object.kind != "KnativeServing"
    ? yamlencode(object)
    : yamlencode(merge(object, { spec = merge(object.spec, local.kourier) }))
  )]

  context = "gcloud container clusters get-credentials ${var.platform.name} --location ${var.platform.location} --project ${var.platform.project} --dns-endpoint"
}

# Checked at every apply, before anything is made.
resource "terraform_data" "tools" {
  triggers_replace = timestamp()

  provisioner "local-exec" {
    command = "${abspath(path.module)}/../../tools.sh gcloud kubectl gke-gcloud-auth-plugin"
  }
}

resource "helm_release" "operator" {
  name             = "knative-operator"
  namespace        = "knative-operator"
  create_namespace = true
  repository       = "https://knative.github.io/operator"
  chart            = "knative-operator"
  version          = var.operator_version
  wait             = true

  depends_on = [terraform_data.tools]
}

module "knative" {
  source = "../../modules/objects"

  name      = "knative-config"
  namespace = "knative-operator"
  objects   = local.installed

  depends_on = [helm_release.operator]
}

# Until Knative serves: the next stage makes objects that its webhooks check.
resource "terraform_data" "ready" {
  triggers_replace = sha256(jsonencode([local.installed, var.operator_version]))

  provisioner "local-exec" {
    command = join(" && ", [
      local.context,
      "kubectl wait --for=condition=Ready knativeserving/knative-serving -n knative-serving --timeout=15m",
      "kubectl wait --for=condition=Ready knativeeventing/knative-eventing -n knative-eventing --timeout=15m",
      "kubectl wait --for=condition=Available deployment --all -n knative-serving --timeout=10m",
    ])

    environment = {
      KUBECONFIG = "${abspath(path.module)}/.rendered/${var.platform.name}.kubeconfig"
    }
  }

  depends_on = [module.knative]
}
