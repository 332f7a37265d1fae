"""SNOMED CT codes of findings of the lexicon, for DICOM and FHIR; where there is none, the finding is told in words.

About half of them are in DICOM's own context groups (PS3.16) too.
"""

from __future__ import annotations

SNOMED = {
    "abscess": ("44132006", "Abscess"),
    "aortic aneurysm": ("67362008", "Aortic aneurysm"),
    "aortic dissection": ("308546005", "Aortic dissection"),
    "appendicitis": ("74400008", "Appendicitis"),
    "ascites": ("389026000", "Ascites"),
    "atelectasis": ("46621007", "Atelectasis"),
    "bone metastasis": ("94222008", "Bony metastasis"),
    "bronchiectasis": ("12295008", "Bronchiectasis"),
    "cardiomegaly": ("8186001", "Cardiomegaly"),
    "cirrhosis": ("19943007", "Cirrhosis of liver"),
    "consolidation": ("95436008", "Lung consolidation"),
    "coronary calcification": ("445512009", "Calcification of coronary artery"),
    "emphysema": ("87433001", "Pulmonary emphysema"),
    "hepatic steatosis": ("197321007", "Steatosis of liver"),
    "hepatomegaly": ("80515008", "Hepatomegaly"),
    "hiatal hernia": ("84089009", "Hiatal hernia"),
    "hydronephrosis": ("43064006", "Hydronephrosis"),
    "lung mass": ("309529002", "Mass of lung"),
    "lymphadenopathy": ("30746006", "Lymphadenopathy"),
    "pancreatitis": ("75694006", "Pancreatitis"),
    "pericardial effusion": ("373945007", "Pericardial effusion"),
    "pleural effusion": ("60046008", "Pleural effusion"),
    "pneumonia": ("233604007", "Pneumonia"),
    "pneumothorax": ("36118008", "Pneumothorax"),
    "pulmonary embolism": ("59282003", "Pulmonary embolism"),
    "renal stone": ("95570007", "Kidney stone"),
    "splenomegaly": ("16294009", "Splenomegaly"),
    "thyroid nodule": ("237495005", "Thyroid Nodule"),
}
SIDES = {"left": ("7771000", "Left"), "right": ("24028007", "Right"), "bilateral": ("51440002", "Bilateral")}
