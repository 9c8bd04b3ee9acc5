# Two buckets: what is kept (prompts, models, images, manifests), and what a job leaves behind.
# Who may touch them is in identity.tf.

resource "google_storage_bucket" "dataset" {
  #checkov:skip=CKV_GCP_62:who read which object is in Cloud Audit Logs; a bucket of access logs would be a second copy of object names to protect
  project                     = var.project
  name                        = "${var.project}-${var.name}-dataset"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  labels                      = local.labels

  # Shards are written once; only the summary and the progress files are replaced.
  versioning {
    enabled = true
  }

  lifecycle_rule {
    action {
      type = "Delete"
    }
    condition {
      days_since_noncurrent_time = 7
      with_state                 = "ARCHIVED"
    }
  }

  lifecycle_rule {
    action {
      type = "AbortIncompleteMultipartUpload"
    }
    condition {
      age = 7
    }
  }

  dynamic "encryption" {
    for_each = var.cmek == null ? [] : [local.kms_key]
    content {
      default_kms_key_name = encryption.value
    }
  }

  depends_on = [google_project_service.this, google_kms_crypto_key_iam_member.service_agent]
}

resource "google_storage_bucket" "staging" {
  #checkov:skip=CKV_GCP_62:see the dataset bucket
  #checkov:skip=CKV_GCP_78:everything here is temporary or can be made again; old versions would only cost
  project                     = var.project
  name                        = "${var.project}-${var.name}-staging"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  labels                      = local.labels

  soft_delete_policy {
    retention_duration_seconds = 0
  }

  # Template specs have no rule: they are small, and jobs are started from them.
  dynamic "lifecycle_rule" {
    for_each = { "staging/" = 30, "temp/" = 14, "compilation-cache/" = 90 }
    content {
      action {
        type = "Delete"
      }
      condition {
        age            = lifecycle_rule.value
        matches_prefix = [lifecycle_rule.key]
      }
    }
  }

  lifecycle_rule {
    action {
      type = "AbortIncompleteMultipartUpload"
    }
    condition {
      age = 1
    }
  }

  dynamic "encryption" {
    for_each = var.cmek == null ? [] : [local.kms_key]
    content {
      default_kms_key_name = encryption.value
    }
  }

  depends_on = [google_project_service.this, google_kms_crypto_key_iam_member.service_agent]
}

resource "google_artifact_registry_repository" "images" {
  #checkov:skip=CKV_GCP_84:encrypted with a customer-managed key where var.cmek names one
  project       = var.project
  location      = var.region
  repository_id = var.name
  description   = "Images of launcher and workers"
  format        = "DOCKER"
  kms_key_name  = local.kms_key
  labels        = local.labels

  # A tag that a template points at must go on meaning the same image.
  docker_config {
    immutable_tags = true
  }

  depends_on = [google_project_service.this, google_kms_crypto_key_iam_member.service_agent]
}
