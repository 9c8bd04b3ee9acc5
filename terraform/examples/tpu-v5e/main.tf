# One job on TPU v5e, four chips a worker, started by the apply, and by each later one that finds it ended. First what
# image and prompts go into:
#   export TF_VAR_project=PROJECT TF_VAR_image_tag=TAG
#   terraform -chdir=terraform/examples/tpu-v5e apply \
#     -target=module.sdjax.google_artifact_registry_repository.images -target=module.sdjax.google_storage_bucket.dataset
# then the image us-central1-docker.pkg.dev/PROJECT/sdjax/sdjax-tpu:TAG and gs://PROJECT-sdjax-dataset/prompts.csv, as in
# terraform/README.md, and then the rest:
#   terraform -chdir=terraform/examples/tpu-v5e apply

terraform {
  required_version = ">= 1.9"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 6.50"
    }
    google-beta = {
      source  = "hashicorp/google-beta"
      version = "~> 6.50"
    }
  }
}

variable "project" {
  description = "Project to run in; Dataflow's TPUs need it on Google's allow-list."
  type        = string
}

variable "image_tag" {
  description = "Tag that the tpu image was pushed under."
  type        = string
}

module "sdjax" {
  source = "../.."

  project   = var.project
  region    = "us-central1"
  image_tag = var.image_tag
  targets   = ["tpu"]

  job = {
    name         = "circles-v5e"
    target       = "tpu"
    machine_type = "ct5lp-hightpu-4t"
    accelerator  = "type:tpu-v5-lite-podslice;topology:2x2"
    zone         = "us-central1-a"
    prompts      = "gs://${var.project}-sdjax-dataset/prompts.csv"
    output       = "gs://${var.project}-sdjax-dataset/runs/circles"
    max_workers  = 2
  }
}

output "sdjax" {
  description = "What pipelines.launch --terraform reads, all of it."
  value       = module.sdjax
}
