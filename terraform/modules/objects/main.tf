# Objects of kinds that another release installs: Helm looks for the kinds when it applies, Terraform's kubernetes_manifest
# already when it plans.

terraform {
  required_version = ">= 1.8"

  required_providers {
    helm = {
      source  = "hashicorp/helm"
      version = "~> 3.0"
    }
  }
}

resource "helm_release" "this" {
  name      = var.name
  namespace = var.namespace
  chart     = "${path.module}/chart"
  values    = [yamlencode({ objects = var.objects })]
  wait      = true
  timeout   = var.timeout_s
}
